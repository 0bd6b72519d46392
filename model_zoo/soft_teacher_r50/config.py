# Soft Teacher on Faster R-CNN with ResNet-50 and FPN, from mmdetection's own file; gradients are clipped, since sets
# are small. Labelled images go through train_pipeline, unlabelled ones through unlabelled_pipeline, which makes a weak
# view for the teacher and a strong one for the student.
_base_ = ["mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py"]

train_pipeline = _base_.sup_pipeline
train_pipeline[5].keep_empty = False  # an image whose boxes all vanish is a true negative, not a hole in the data
unlabelled_pipeline = _base_.unsup_pipeline
unlabelled_ratio = 4
optim_wrapper = dict(clip_grad=dict(max_norm=35.0, norm_type=2))
