# Soft Teacher with faster_rcnn_tiny as student and teacher. Pseudo boxes count from a score of 0.7 (mmdetection: 0.9),
# which a detector of this size reaches within its few hundred steps.
_base_ = ["../faster_rcnn_tiny/config.py"]

model = dict(
    _delete_=True,
    type="SoftTeacher",
    detector={{_base_.model}},
    data_preprocessor=dict(
        type="MultiBranchDataPreprocessor", data_preprocessor={{_base_.model.data_preprocessor}}
    ),
    semi_train_cfg=dict(
        freeze_teacher=True,
        sup_weight=1.0,
        unsup_weight=1.0,
        pseudo_label_initial_score_thr=0.5,
        rpn_pseudo_thr=0.7,
        cls_pseudo_thr=0.7,
        reg_pseudo_thr=0.02,
        jitter_times=10,
        jitter_scale=0.06,
        min_pseudo_bbox_wh=(1e-2, 1e-2),
    ),
    semi_test_cfg=dict(predict_on="teacher"),
)

branches = ["sup", "unsup_teacher", "unsup_student"]
view_keys = (
    "img_id",
    "img_path",
    "ori_shape",
    "img_shape",
    "scale_factor",
    "flip",
    "flip_direction",
    "homography_matrix",
)
colours = [
    [dict(type="ColorTransform")],
    [dict(type="AutoContrast")],
    [dict(type="Equalize")],
    [dict(type="Sharpness")],
    [dict(type="Posterize")],
    [dict(type="Solarize")],
    [dict(type="Color")],
    [dict(type="Contrast")],
    [dict(type="Brightness")],
]
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(160, 128), keep_ratio=True),
    dict(
        type="RandomAffine",
        max_rotate_degree=0.0,
        max_translate_ratio=0.1,
        scaling_ratio_range=(0.7, 1.4),
        max_shear_degree=0.0,
        border_val=(114, 114, 114),
    ),
    dict(type="RandomFlip", prob=0.5),
    dict(type="MultiBranch", branch_field=branches, sup=dict(type="PackDetInputs")),
]
unlabelled_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadEmptyAnnotations"),
    dict(
        type="MultiBranch",
        branch_field=branches,
        unsup_teacher=[
            dict(type="Resize", scale=(160, 128), keep_ratio=True),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs", meta_keys=view_keys),
        ],
        unsup_student=[
            dict(type="Resize", scale=(160, 128), keep_ratio=True),
            dict(type="RandomFlip", prob=0.5),
            dict(type="RandAugment", aug_space=colours, aug_num=1),
            dict(
                type="RandAugment",
                aug_space=[[dict(type="TranslateX")], [dict(type="TranslateY")]],
                aug_num=1,
            ),
            dict(type="RandomErasing", n_patches=(1, 5), ratio=(0, 0.2)),
            dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2)),
            dict(type="PackDetInputs", meta_keys=view_keys),
        ],
    ),
]
unlabelled_ratio = 1
