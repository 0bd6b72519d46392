# YOLOX-s, from mmdetection's own file with its recipe (mosaics, mix-ups, an average of the weights), with two changes:
# images are padded in the batch and not in the pipeline, so that padding is known as such, and random sizes of whole
# batches are left out.
_base_ = ["mmdet::yolox/yolox_s_8xb8-300e_coco.py"]

model = dict(
    data_preprocessor=dict(pad_size_divisor=32, pad_value=114, batch_augments=None),
    test_cfg=dict(nms=dict(max_num=100)),
)
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="Resize", scale=(640, 640), keep_ratio=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
optim_wrapper = dict(clip_grad=dict(max_norm=35.0, norm_type=2))
