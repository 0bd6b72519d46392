# Faster R-CNN with ResNet-50 and FPN, from mmdetection's own file; gradients are clipped, since sets are small.
_base_ = ["mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"]

optim_wrapper = dict(clip_grad=dict(max_norm=35.0, norm_type=2))
