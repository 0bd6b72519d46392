# SSD300 with VGG-16, from mmdetection's own file; gradients are clipped, since sets are small.
_base_ = ["mmdet::ssd/ssd300_coco.py"]

optim_wrapper = dict(clip_grad=dict(max_norm=35.0, norm_type=2))
