# FCOS with ResNet-50 (Caffe weights) and FPN, from mmdetection's own file.
_base_ = ["mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py"]
