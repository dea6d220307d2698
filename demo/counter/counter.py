"""Counts its runs, and takes as many seconds for each as it is asked to."""

import time

runs = 0


def handler(event, context):
    global runs
    runs += 1
    run = runs
    print(f"run {run} begins")
    time.sleep(event["seconds"])
    return {"run": run}
