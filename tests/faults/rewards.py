"""A reward for the runs of the harness. An untrained model earns nothing; this gives its responses something to differ
by, and leaves some groups equal, which group filtering then rejects."""


def uneven_reward(response: str, record: dict) -> float:
    return float(len(response) % 3 == 0)
