# RetinaNet with MobileNetV2: the maps at strides 4, 8, 16 and 32 have 24, 32, 96 and 320 channels.
_base_ = ["../retinanet_r50_fpn/config.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="MobileNetV2",
        out_indices=(1, 2, 4, 6),
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
    ),
    neck=dict(in_channels=[24, 32, 96, 320]),
)
