# Generalised focal loss on the backbone, pyramid, pipelines and optimiser of retinanet_tiny. Boxes reach eight cells
# from their centre on each side: half the image on the finest level.
_base_ = ["../retinanet_tiny/config.py"]

model = dict(
    type="GFL",
    bbox_head=dict(
        _delete_=True,
        type="GFLHead",
        num_classes=80,
        in_channels=48,
        feat_channels=48,
        stacked_convs=2,
        norm_cfg=dict(type="GN", num_groups=8, requires_grad=True),
        anchor_generator=dict(
            type="AnchorGenerator",
            ratios=[1.0],
            octave_base_scale=4,
            scales_per_octave=1,
            strides=[8, 16, 32],
        ),
        reg_max=8,
        loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_dfl=dict(type="DistributionFocalLoss", loss_weight=0.25),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(
        _delete_=True,
        assigner=dict(type="ATSSAssigner", topk=9),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
)
