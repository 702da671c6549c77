"""Results of runs that never took place."""

from utils.metrics import FORMAT, measure

DATA = {"split": "folder", "classes": 4, "class_names_sha256": "a" * 64, "train_images": 28, "test_images": 12}
SETTINGS = {
    "dataset": "Icon_R",
    "learner_name": "L2P",
    "KD_method": "KD",
    "t_model": "mini_vit_base",
    "s_model": "mini_vit_small",
    "random_s": 1,
    "kd_prompt_param": [4, 6],
    "lr": 0.1,
    "class_order": "natural",
    "validation": False,
    "upper_bound_flag": False,
}


def fake_metrics(
    student, teacher=None, *, num_tasks=None, stream_tasks=None, data=DATA, losses=None, prompt_usage=None, **settings
):
    """The content of metrics.json for two lists of accuracy rows; ``settings`` override SETTINGS."""
    settings = {**SETTINGS, **settings}
    names = {key: settings[key] for key in ("dataset", "learner_name", "KD_method", "t_model", "s_model")}
    return {
        "format": FORMAT,
        **names,
        "seed": settings["random_s"],
        "settings": settings,
        "num_tasks": num_tasks or len(student),
        "stream_tasks": stream_tasks or num_tasks or len(student),
        "data": data,
        "teacher": None if teacher is None else measure(teacher),
        "student": measure(student),
        "losses": losses or {},
        "prompt_usage": prompt_usage or {},
        "prompts_per_task": 1,
    }
