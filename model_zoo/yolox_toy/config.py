# YOLOX's head, losses and assignment on the backbone, pyramid, pipelines and optimiser of retinanet_tiny.
_base_ = ["../retinanet_tiny/config.py"]

model = dict(
    type="YOLOX",
    bbox_head=dict(
        _delete_=True,
        type="YOLOXHead",
        num_classes=80,
        in_channels=48,
        feat_channels=48,
        stacked_convs=2,
        strides=(8, 16, 32),
        norm_cfg=dict(type="GN", num_groups=8, requires_grad=True),
        act_cfg=dict(type="Swish"),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, reduction="sum", loss_weight=1.0),
        loss_bbox=dict(type="IoULoss", mode="square", eps=1e-16, reduction="sum", loss_weight=5.0),
        loss_obj=dict(type="CrossEntropyLoss", use_sigmoid=True, reduction="sum", loss_weight=1.0),
        loss_l1=dict(type="L1Loss", reduction="sum", loss_weight=1.0),
    ),
    train_cfg=dict(_delete_=True, assigner=dict(type="SimOTAAssigner", center_radius=2.5)),
    test_cfg=dict(
        _delete_=True, score_thr=0.01, nms=dict(type="nms", iou_threshold=0.65, max_num=100)
    ),
)
