"""Small folders laid out like the published VOC and COCO data, with pictures."""

import json

import numpy as np
from PIL import Image

_OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""
SIDES = (96, 64)


def picture(path, seed, boxes=()):
    """Noise with bright boxes, as JPEG; boxes are x, y, width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 90, (SIDES[1], SIDES[0], 3), dtype=np.uint8)
    for k, (x, y, width, height) in enumerate(boxes):
        pixels[int(y) : int(y + height), int(x) : int(x + width), k % 3] = 230
    Image.fromarray(pixels).save(path, quality=90)


def voc_devkit(root, trainval, test):
    """``VOCdevkit/VOC2007`` and ``VOC2012``, each with so many images of a dog and a difficult person."""
    for year in ("2007", "2012"):
        folder = root / "VOCdevkit" / f"VOC{year}"
        (folder / "Annotations").mkdir(parents=True)
        (folder / "ImageSets" / "Main").mkdir(parents=True)
        names = [f"{number:06d}" for number in range(1, trainval + test + 1)]
        for number, name in enumerate(names):
            objects = [
                _OBJECT.format(name="dog", difficult=0, box=(1, 1, 40, 30)),
                _OBJECT.format(name="person", difficult=1, box=(50, 10, 96, 64)),
            ]
            if number % 2:
                objects[1] = _OBJECT.format(name="car", difficult=0, box=(50, 10, 90, 60))
            size = f"<size><width>{SIDES[0]}</width><height>{SIDES[1]}</height><depth>3</depth></size>"
            text = f"<annotation><filename>{name}.jpg</filename>{size}{''.join(objects)}</annotation>"
            (folder / "Annotations" / f"{name}.xml").write_text(text)
            picture(folder / "JPEGImages" / f"{name}.jpg", number, [(0, 0, 40, 30), (49, 9, 40, 50)])
        (folder / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(names[:trainval]) + "\n")
        (folder / "ImageSets" / "Main" / "test.txt").write_text("\n".join(names[trainval:]) + "\n")


def coco_layout(root, train, val):
    """``annotations/instances_*.json`` and the folders of images; ids of classes have gaps, as COCO's have."""
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 90, "name": "toothbrush"}]
    for split, count, first in (("train2017", train, 1), ("val2017", val, 500)):
        images, rows = [], []
        for image_id in range(first, first + count):
            name = f"{image_id:012d}.jpg"
            boxes = [[0, 0, 40, 30], [49, 9, 40, 50]]
            picture(root / split / name, image_id, boxes)
            images.append({"id": image_id, "file_name": name, "width": SIDES[0], "height": SIDES[1]})
            for k, box in enumerate(boxes):
                rows.append({"id": len(rows) + 1, "image_id": image_id, "category_id": (18, 1)[k], "bbox": box,
                             "area": box[2] * box[3], "iscrowd": 0, "segmentation": []})  # fmt: skip
        if split == "val2017":
            rows[0]["iscrowd"] = 1
        content = {"info": {}, "licenses": [], "images": images, "annotations": rows, "categories": categories}
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def write_coco(folder, boxes, name="coco.json"):
    """One image with these boxes of one class."""
    if not (folder / "a.jpg").is_file():
        picture(folder / "a.jpg", 1)
    images = [{"id": 1, "file_name": "a.jpg", "width": SIDES[0], "height": SIDES[1]}]
    rows = [{"id": k, "image_id": 1, "category_id": 3, "bbox": box} for k, box in enumerate(boxes, start=1)]
    path = folder / name
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": [{"id": 3, "name": "cat"}]}))
    return path


SWAPPED = "<bndbox><xmin>9</xmin><ymin>8</ymin><xmax>3</xmax><ymax>2</ymax></bndbox>"


def own_voc(root, names, size=(20, 10), listed=None, suffix=".png"):
    """A VOC folder with a class of its own."""
    folder = root / "VOC2024"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for name in names:
        Image.new("RGB", (20, 10)).save(folder / "JPEGImages" / f"{name}{suffix}")
        sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation>{sides}<object><name>crab</name>{SWAPPED}</object></annotation>"
        )
    (folder / "ImageSets" / "Main" / "all.txt").write_text("\n".join(listed or names))
    return [("2024", "all")]
