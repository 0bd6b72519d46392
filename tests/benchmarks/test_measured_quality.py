"""The benchmark of intervals: what is shown today holds the mAP of all images, what was shown before did not."""

import json

import numpy as np

from benchmarks.measured_quality import QUALITIES, as_table, main, random_records, run


def test_todays_interval_holds_what_it_says_and_that_of_before_did_not(capsys):
    rows = run([], 60)
    assert [row["detector"] for row in rows] == list(QUALITIES)
    assert rows[0]["map"] < rows[1]["map"] < rows[2]["map"]
    now, before = (np.mean([row[way]["held_pct"] for row in rows]) for way in ("now", "before"))
    assert 90 <= now <= 99 and before < now - 5
    assert as_table(rows).count("random boxes") == 3


def test_a_set_is_read_from_its_annotations_alone(tmp_path, capsys):
    records, _ = random_records(60)
    for name, part in (("pool", records[:40]), ("test", records[40:])):
        boxes = [(r.image_id, i) for r in part for i in r.instances]
        content = {
            "images": [{"id": r.image_id, "file_name": f"{r.image_id}.jpg", "width": 640, "height": 640} for r in part],
            "annotations": [
                {"id": n, "image_id": image_id, "category_id": i.class_index + 1, "iscrowd": 0, "area": 1.0,
                 "bbox": [i.box_xyxy[0], i.box_xyxy[1], i.box_xyxy[2] - i.box_xyxy[0], i.box_xyxy[3] - i.box_xyxy[1]]}
                for n, (image_id, i) in enumerate(boxes, start=1)
            ],
            "categories": [{"id": c + 1, "name": str(c)} for c in range(3)],
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert main(["--data", str(tmp_path), "--projects", "5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["set"] for row in rows] == [tmp_path.name] * 3 and rows[0]["now"]["shown"] >= 1
