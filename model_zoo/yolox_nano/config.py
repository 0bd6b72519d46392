# YOLOX-nano at 416 px: YOLOX-tiny with a narrower backbone of depthwise convolutions (0.9 M parameters), as mmdetection
# defines it.
_base_ = ["../yolox_tiny/config.py"]

model = dict(
    backbone=dict(deepen_factor=0.33, widen_factor=0.25, use_depthwise=True),
    neck=dict(in_channels=[64, 128, 256], out_channels=64, num_csp_blocks=1, use_depthwise=True),
    bbox_head=dict(in_channels=64, feat_channels=64, use_depthwise=True),
)
