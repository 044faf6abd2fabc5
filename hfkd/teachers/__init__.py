"""Where the teacher's answers come from, one kind a file. Frozen, in eval mode, without gradients: in `teacher.py`, once."""

from hfkd.teachers.adapter import AdapterTeacher
from hfkd.teachers.cached import CachedTeacher
from hfkd.teachers.ensemble import EnsembleTeacher
from hfkd.teachers.model import ModelTeacher
from hfkd.teachers.teacher import Teacher

__all__ = ["AdapterTeacher", "CachedTeacher", "EnsembleTeacher", "ModelTeacher", "Teacher"]
