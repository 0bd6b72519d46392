# DINO with ResNet-50 and four scales, from mmdetection's own file. It always answers with its best queries, however
# unlikely; a hundred of them are enough for a labeling project.
_base_ = ["mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"]

model = dict(test_cfg=dict(max_per_img=100))
