"""SkyServe's own load balancer, and a stub of the controller that tells it its replicas.

skyserve.py balancer PORT | skyserve.py controller URL...
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

CONTROLLER_PORT = 8901


def controller(urls: list[str]) -> None:
    answer = json.dumps({"replica_info": {url: {"gpu_type": "none"} for url in urls}}).encode()

    class Sync(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            pass

    HTTPServer(("127.0.0.1", CONTROLLER_PORT), Sync).serve_forever()


def balancer(port: int) -> None:
    from sky.serve.load_balancer import SkyServeLoadBalancer

    SkyServeLoadBalancer(f"http://127.0.0.1:{CONTROLLER_PORT}", port, "least_load").run()


if __name__ == "__main__":
    if sys.argv[1] == "controller":
        controller(sys.argv[2:])
    else:
        balancer(int(sys.argv[2]))
