"""Tasks that ask for something in a long text, made with a seed at any length. One family a file.

needle_single       one hidden number                          RULER, arXiv 2404.06654
needle_multi_key    one hidden number among several
needle_multi_value  all hidden numbers of one key
variable_tracking   the variables of a chain of assignments
common_words        the words that a list has most often
passage_qa          a question about a planted passage
"""

from xkv_fx.evaluation.tasks import needles, variables, common_words, passages  # noqa: F401, I001  (registers them, in this order)
from xkv_fx.evaluation.tasks.base import Instance, check_task, make_instances, register_task, task_names

NEEDLES = ("needle_single", "needle_multi_key", "needle_multi_value")

__all__ = ["NEEDLES", "Instance", "check_task", "make_instances", "register_task", "task_names"]
