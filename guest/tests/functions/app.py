import json
import os
import sys
import time

print("importing")


def handler(event, context):
    print("called with", json.dumps(event))
    print("to standard error", file=sys.stderr)
    return {
        "event": event,
        "request": context.aws_request_id,
        "name": context.function_name,
        "version": context.function_version,
        "memory": context.memory_limit_in_mb,
        "arn": context.invoked_function_arn,
        "log_group": context.log_group_name,
        "left_ms": context.get_remaining_time_in_millis(),
        "cwd": os.getcwd(),
        "python": sys.version_info[:2],
    }


def fails(event, context):
    raise ValueError("no such thing: " + event["thing"])


def sleeps(event, context):
    time.sleep(event["seconds"])
    return "slept"


def fails_at_length(event, context):
    if "characters" in event:
        raise ValueError("x" * event["characters"])
    if "frames" in event:
        sys.setrecursionlimit(2 * event["frames"])
    return down(event.get("frames", -1))


def down(left):
    if left == 0:
        raise KeyError("at the bottom")
    return down(left - 1)


def variable(event, context):
    return os.environ.get(event["name"])
