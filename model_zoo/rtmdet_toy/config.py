# RTMDet's head, loss and assignment on the backbone, pyramid, pipelines and optimiser of retinanet_tiny. Distances are
# exponentials, as in the larger RTMDet: boxes then overlap objects from the first step, on which the assignment rests.
_base_ = ["../retinanet_tiny/config.py"]

model = dict(
    type="RTMDet",
    bbox_head=dict(
        _delete_=True,
        type="RTMDetSepBNHead",
        num_classes=80,
        in_channels=48,
        feat_channels=48,
        stacked_convs=2,
        anchor_generator=dict(type="MlvlPointGenerator", offset=0, strides=[8, 16, 32]),
        bbox_coder=dict(type="DistancePointBBoxCoder"),
        loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        with_objectness=False,
        exp_on_reg=True,
        share_conv=True,
        pred_kernel_size=1,
        norm_cfg=dict(type="BN"),
        act_cfg=dict(type="SiLU", inplace=True),
    ),
    train_cfg=dict(
        _delete_=True,
        assigner=dict(type="DynamicSoftLabelAssigner", topk=13),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
)
