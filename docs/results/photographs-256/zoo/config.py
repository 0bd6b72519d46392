# YOLOX-nano at 256 px instead of 416: two and a half times as many trainings in the same time.
_base_ = ["../../../../model_zoo/yolox_nano/config.py"]

size = 256
reading = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(size, size), keep_ratio=True),
]
affine = dict(
    type="RandomAffine",
    max_rotate_degree=0.0,
    max_translate_ratio=0.1,
    max_shear_degree=0.0,
    border_val=(114, 114, 114),
)
finishing = [
    dict(type="YOLOXHSVRandomAug"),
    dict(type="RandomFlip", prob=0.5),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1), keep_empty=False),
    dict(type="PackDetInputs"),
]
train_pipeline = [
    *reading,
    dict(type="Mosaic", img_scale=(size, size), pad_val=114.0),
    dict(affine, scaling_ratio_range=(0.3, 1.8), border=(-size // 2, -size // 2)),
    *finishing,
]
train_dataloader = dict(dataset=dict(_delete_=True, pipeline=train_pipeline))
custom_hooks = [
    dict(
        type="PipelineSwitchHook",
        switch_epoch=255,
        switch_pipeline=[*reading, dict(affine, scaling_ratio_range=(0.5, 1.5)), *finishing],
    ),
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.002, update_buffers=True, priority=49),
]
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="Resize", scale=(size, size), keep_ratio=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
