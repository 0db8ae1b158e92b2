"""What lab 06's client sees of vLLM, without vLLM. `FAKE_VLLM` says what goes wrong; pids go into the file `FAKE_PIDS`.

An answer to a prompt that ends with token t is t + 1, t + 2, ...
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODE = os.environ.get("FAKE_VLLM", "")
METRICS = """# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="smol"} %(usage)s
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="smol"} %(tokens)s
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{engine="0",model_name="smol"} 1.7e9
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="smol",source="local_compute"} 6.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="smol",source="local_cache_hit"} 4.0
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="smol"} 0.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="smol"} 2.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="smol"} 2.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="smol"} 0.5
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0",num_gpu_blocks="24"} 1.0
"""
DYING = """(APIServer pid=12) INFO 11-26 22:00:00 [utils.py:1] some words
(EngineCore pid=13) ERROR 11-26 22:00:01 [core.py:99] Traceback (most recent call last):
(EngineCore pid=13) ERROR 11-26 22:00:01 [core.py:99] ValueError: Block size 48 is not supported.
(APIServer pid=12) Traceback (most recent call last):
(APIServer pid=12) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
MADE = {"tokens": 0, "running": 0}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def say(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        if self.path == "/metrics":
            return self.say(200, METRICS % {"tokens": MADE["tokens"], "usage": 0.5 if MADE["running"] else 0.0})
        if self.path == "/version":
            return self.say(200, '{"version": "0.32.0"}')
        mine = self.headers["Authorization"] == f"Bearer {os.environ['VLLM_API_KEY']}"
        return self.say(200 if mine else 401, '{"data": [{"id": "smol"}]}')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if MODE == "refuses":
            return self.say(
                400, '{"error": {"message": "The decoder prompt (length 900) is longer than 512.", "code": 400}}'
            )
        MADE["running"] += 1
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for step in range(body["max_tokens"]):
            if step == 3 and MODE == "dies":
                print("(EngineCore pid=13) ERROR 11-26 22:00:01 [core.py:99] MemoryError: no more of it", flush=True)
                os._exit(1)
            if step == 3 and MODE == "gives up":
                self.event({"error": {"message": "EngineCore encountered an issue.", "code": 500}})
            if step == 3 and MODE == "hangs":
                time.sleep(600)
            time.sleep(0.06)
            MADE["tokens"] += 1
            self.event({"choices": [{"text": "", "token_ids": [body["prompt"][-1] + step + 1]}]})
        MADE["running"] -= 1
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def event(self, event):
        self.chunk(f"data: {json.dumps(event)}\n\n".encode())

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


def main():
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    child.stdout.readline()  # it ignores SIGTERM from here on
    if "FAKE_PIDS" in os.environ:
        with open(os.environ["FAKE_PIDS"], "w") as file:
            print(os.getpid(), child.pid, file=file)
    if MODE == "dies at once":
        print(DYING, flush=True)
        sys.exit(1)
    if MODE == "never up":
        print("INFO 11-26 22:00:00 [core.py:1] loading", flush=True)
        time.sleep(600)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
