"""KD (Hinton et al. 2015, arXiv 1503.02531): soft targets on the class head."""

from learners.distillers.base import Distiller


class KD(Distiller):
    """``alpha * tau^2 * KL`` between the current task's logits of both class heads: the base as it is."""
