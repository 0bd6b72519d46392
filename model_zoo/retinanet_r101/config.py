# RetinaNet with ResNet-101: everything else as with ResNet-50.
_base_ = ["../retinanet_r50_fpn/config.py"]

model = dict(backbone=dict(depth=101))
