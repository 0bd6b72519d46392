# DDOD with ResNet-50 and FPN, from mmdetection's own file; gradients are clipped, since sets are small. Its deformable
# convolution needs three cells at least on the last level (stride 128): images more than five times as long as they
# are high do not fit.
_base_ = ["mmdet::ddod/ddod_r50_fpn_1x_coco.py"]

optim_wrapper = dict(clip_grad=dict(max_norm=35.0, norm_type=2))
