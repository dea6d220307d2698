"""Computes without pause, on every CPU that its machine has or in as many processes as it is asked to, and between calls too."""

import os


def handler(event, context):
    processes = event.get("processes", os.cpu_count())
    for _ in range(processes):
        if os.fork() == 0:
            while True:
                pass
    return {"processes": processes}
