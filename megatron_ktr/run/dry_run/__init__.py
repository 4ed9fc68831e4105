"""``--dry-run``: what a run would be, found out in one process, without GPUs, and without weights or data if need be.

``model`` finds the model's sizes and builds its shapes stage by stage; ``estimate`` works out memory and time;
``data`` reads the question files as training does; ``command`` puts all of it together and prints it. What cannot be
looked at where the command runs is named, and is no error. What training would refuse is one.
"""
