# DDOD on the backbone, pyramid, pipelines and optimiser of retinanet_tiny, without deformable convolutions, so that
# images of any shape fit.
_base_ = ["../retinanet_tiny/config.py"]

model = dict(
    type="DDOD",
    bbox_head=dict(
        _delete_=True,
        type="DDODHead",
        num_classes=80,
        in_channels=48,
        feat_channels=48,
        stacked_convs=2,
        use_dcn=False,
        norm_cfg=dict(type="GN", num_groups=8, requires_grad=True),
        anchor_generator=dict(
            type="AnchorGenerator",
            ratios=[1.0],
            octave_base_scale=4,
            scales_per_octave=1,
            strides=[8, 16, 32],
        ),
        bbox_coder=dict(
            type="DeltaXYWHBBoxCoder",
            target_means=[0.0, 0.0, 0.0, 0.0],
            target_stds=[0.1, 0.1, 0.2, 0.2],
        ),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        loss_iou=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
    ),
    train_cfg=dict(
        _delete_=True,
        assigner=dict(type="ATSSAssigner", topk=9, alpha=0.8),
        reg_assigner=dict(type="ATSSAssigner", topk=9, alpha=0.5),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
)
