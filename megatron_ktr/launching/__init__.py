"""What ``python -m megatron_ktr.launch`` adds to torchrun: ranks that end with their launcher, restarts that know which
failures are worth one, and lost nodes that are noticed.

    arguments.py   checks torchrun's arguments, and prepares a run that may be restarted
    supervisor.py  the process that the user starts; starts the agent again when that is killed
    agent.py       torch's elastic agent: starts the ranks of this node and looks after them
    lifeline.py    lets the kernel kill a rank when its agent ends
"""
