#!/usr/bin/python3.11
"""An external extension that does what the variable EXTENSION of the function says."""

import http.client
import http.server
import json
import os
import sys
import threading

DO = os.environ.get("EXTENSION", "")
NAME = os.path.basename(sys.argv[0])


def say(*words):
    print(NAME, *words, flush=True)


def call(method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(os.environ["AWS_LAMBDA_RUNTIME_API"])
    connection.request(method, path, body and json.dumps(body), headers or {})
    response = connection.getresponse()
    return response, json.loads(response.read())


class Listener(http.server.BaseHTTPRequestHandler):
    """Keeps each batch of telemetry, where the function can read it."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        with open("/tmp/telemetry", "ab") as file:
            file.write(body + b"\n")
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


def subscribe(own):
    server = http.server.ThreadingHTTPServer(("", 4243), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    subscription = {
        "schemaVersion": "2022-12-13",
        "types": ["platform", "function", "extension"],
        "buffering": {"maxItems": 1000, "maxBytes": 262144, "timeoutMs": 25},
        "destination": {"protocol": "HTTP", "URI": "http://sandbox.localdomain:4243/"},
    }
    response, answer = call("PUT", "/2022-07-01/telemetry", subscription, own)
    say("subscribed", response.status, answer)


def main():
    say("starts in", os.getcwd(), sorted(name for name in os.environ if name in ("_HANDLER", "LAMBDA_TASK_ROOT", "TABLE")))
    if DO == "exits at init":
        sys.exit(4)
    if DO == "never registers":
        threading.Event().wait()
    events = {"events": ["INVOKE", "SHUTDOWN"]}
    response, _ = call("POST", "/2020-01-01/extension/register", events, {"Lambda-Extension-Name": NAME})
    own = {"Lambda-Extension-Identifier": response.headers["Lambda-Extension-Identifier"]}
    if DO == "subscribes":
        subscribe(own)
    while True:
        _, event = call("GET", "/2020-01-01/extension/event/next", None, own)
        say(json.dumps(event))
        if DO == "exits when invoked":
            sys.exit(3)
        if event["eventType"] == "SHUTDOWN" and DO != "stays":
            return


main()
