# YOLOX-nano at 256 px instead of 416: two and a half times as many trainings in the same time.
_base_ = ["../../../../model_zoo/yolox_nano/config.py"]

size = 256
resize = dict(type="Resize", scale=(size, size), keep_ratio=True)
reading = [*_base_.reading[:-1], resize]
train_pipeline = [
    *reading,
    dict(type="Mosaic", img_scale=(size, size), pad_val=114.0),
    dict(_base_.affine, scaling_ratio_range=(0.3, 1.8), border=(-size // 2, -size // 2)),
    *_base_.finishing,
]
train_dataloader = dict(dataset=dict(_delete_=True, pipeline=train_pipeline))
without_mosaic = [*reading, dict(_base_.affine, scaling_ratio_range=(0.5, 1.5)), *_base_.finishing]
custom_hooks = [dict(_base_.custom_hooks[0], switch_pipeline=without_mosaic), *_base_.custom_hooks[1:]]
test_pipeline = [_base_.test_pipeline[0], resize, *_base_.test_pipeline[2:]]
