"""No distillation: the student learns alone (the paper's rows without a teacher)."""

from learners.distillers.base import Distiller


class NoDistillation(Distiller):
    """Plain cross entropy with weight 1; no teacher is built or trained."""
