# RetinaNet with Swin-T, from mmdetection's own file. Transformers train with AdamW.
_base_ = ["mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"]

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=0.0001, weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "absolute_pos_embed": dict(decay_mult=0.0),
            "relative_position_bias_table": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
        }
    ),
    clip_grad=dict(max_norm=35.0, norm_type=2),
)
