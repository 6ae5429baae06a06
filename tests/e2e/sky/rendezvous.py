"""What a multi-node server does at its start, on each node of a replica: `rendezvous.py RANK NODES HEAD`.

Every rank but 0 joins rank 0 and stays until rank 0 is gone, which is an error there, as with SGLang. Rank 0
returns when all have joined; a child of it keeps them.
"""

import os
import socket
import sys
import time

LIMIT = 120.0  # seconds for all ranks to come
PORT = 29500


def main(rank: int, nodes: int, head: str) -> int:
    if rank == 0:
        with socket.create_server(("0.0.0.0", PORT)) as listener:
            listener.settimeout(LIMIT)
            joined = []
            while len(joined) < nodes - 1:
                connection, address = listener.accept()
                who = connection.recv(16).decode()
                print(f"rank {who} joined from {address[0]}", flush=True)
                joined.append(connection)
        run = os.getppid()  # the script, which becomes the server
        if joined and os.fork() == 0:
            while os.path.exists(f"/proc/{run}"):
                time.sleep(1)
            os._exit(0)
        return 0
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            connection = socket.create_connection((head, PORT), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                print(f"rank 0 does not answer: {error}", flush=True)
                return 1
            time.sleep(0.5)
    connection.settimeout(None)
    connection.sendall(str(rank).encode())
    print(f"joined rank 0 at {head}", flush=True)
    connection.recv(1)
    print("rank 0 is gone", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
