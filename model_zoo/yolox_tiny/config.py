# YOLOX-tiny at 416 px: mmdetection's own model, with a recipe for fine-tuning on few photographs (docs/benchmarks.md
# has the trials): the COCO backbone stays as it is, the rest trains with AdamW on mosaics of four images, on single
# images towards the end, and an average of the weights is what predicts. Images are padded in the batch and not in the
# pipeline, so that padding is known as such.
_base_ = ["mmdet::yolox/yolox_tiny_8xb8-300e_coco.py"]

size = 416
model = dict(
    data_preprocessor=dict(pad_size_divisor=32, pad_value=114, batch_augments=None),
    backbone=dict(frozen_stages=4),
    test_cfg=dict(nms=dict(max_num=100)),
)
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
        switch_epoch=255,  # of 300: the last 15 % of a training
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
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=0.002, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=35.0, norm_type=2),
)
