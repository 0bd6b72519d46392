# RTMDet-tiny, from mmdetection's own file, with three changes: batch norm is not synchronised, so that it runs
# anywhere; images are padded in the batch and not in the pipeline, so that padding is known as such; and mosaics,
# which keep earlier images in memory and would make a resumed training differ, give way to zooms and crops.
_base_ = ["mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"]

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(norm_cfg=dict(type="BN")),
    neck=dict(norm_cfg=dict(type="BN")),
    bbox_head=dict(norm_cfg=dict(type="BN")),
    test_cfg=dict(max_per_img=100),
)
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomResize", scale=(640, 640), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(640, 640), allow_negative_crop=True),
    dict(type="YOLOXHSVRandomAug"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="Resize", scale=(640, 640), keep_ratio=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
optim_wrapper = dict(clip_grad=dict(max_norm=35.0, norm_type=2))
