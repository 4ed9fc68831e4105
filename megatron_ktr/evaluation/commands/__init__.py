"""The commands of ``tools/evaluate.py``, one file each."""
