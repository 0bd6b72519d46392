# MM Grounding DINO with Swin-T, from mmdetection's own file for fine-tuning it, where backbone and text encoder stand
# still. No weight depends on the classes (256 of them have noise to learn from); fairscale is not needed.
_base_ = ["mmdet::mm_grounding_dino/grounding_dino_swin-t_finetune_8xb4_20e_cat.py"]

model = dict(encoder=dict(num_cp=0), bbox_head=dict(num_classes=256), test_cfg=dict(max_per_img=100))

# Images are read as in training; mmdetection's file reads them with Pillow, which knows no 16-bit colours.
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="FixScaleResize", scale=(800, 1333), keep_ratio=True, backend="pillow"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "text", "custom_entities"),
    ),
]
