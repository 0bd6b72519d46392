# DINO on the backbone, pipelines and optimiser of retinanet_tiny: three scales, 64 channels, one encoder and two
# decoder layers, and sixty queries, which is fewer than the cells of the smallest input (160 x 32 px: 105).
_base_ = ["../retinanet_tiny/config.py"]

model = dict(
    type="DINO",
    num_queries=60,
    num_feature_levels=3,
    with_box_refine=True,
    as_two_stage=True,
    backbone=dict(out_indices=(1, 2, 3)),
    neck=dict(
        _delete_=True,
        type="ChannelMapper",
        in_channels=[32, 64, 128],
        kernel_size=1,
        out_channels=64,
        act_cfg=None,
        norm_cfg=dict(type="GN", num_groups=8),
        num_outs=3,
    ),
    encoder=dict(
        num_layers=1,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=64, num_heads=4, num_levels=3, dropout=0.0),
            ffn_cfg=dict(embed_dims=64, feedforward_channels=128, ffn_drop=0.0),
        ),
    ),
    decoder=dict(
        num_layers=2,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=64, num_heads=4, dropout=0.0),
            cross_attn_cfg=dict(embed_dims=64, num_heads=4, num_levels=3, dropout=0.0),
            ffn_cfg=dict(embed_dims=64, feedforward_channels=128, ffn_drop=0.0),
        ),
        post_norm_cfg=None,
    ),
    positional_encoding=dict(num_feats=32, normalize=True, offset=0.0, temperature=20),
    bbox_head=dict(
        _delete_=True,
        type="DINOHead",
        num_classes=80,
        embed_dims=64,
        sync_cls_avg_factor=True,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
    ),
    dn_cfg=dict(
        label_noise_scale=0.5,
        box_noise_scale=1.0,
        group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=20),
    ),
    train_cfg=dict(
        _delete_=True,
        assigner=dict(
            type="HungarianAssigner",
            match_costs=[
                dict(type="FocalLossCost", weight=2.0),
                dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
                dict(type="IoUCost", iou_mode="giou", weight=2.0),
            ],
        ),
    ),
    test_cfg=dict(_delete_=True, max_per_img=50),
)
