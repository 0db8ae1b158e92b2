"""In the place of kvpress' Python: answers as `kvpress_inside.py` does. `FAKE_KVPRESS` says what goes wrong.

The surprise of every token is the number of its passage, so many hundredths, and the draw's number.
"""

import json
import os
import signal
import sys
import time

MARK = "labkit-answer "
MODE = os.environ.get("FAKE_KVPRESS", "")
assert sys.argv[1] == "-P"
assert sys.argv[2].endswith("kvpress_inside.py")
asked = json.load(sys.stdin)
print("a library prints what it likes")
if MODE == "dies":
    sys.exit("Traceback\nAssertionError: Query length 20 should be greater than the window size 32\n")
if MODE == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if MODE == "silent":
    sys.exit()
if MODE == "hangs":
    time.sleep(60)
scored = len(asked["passages"][0]) - asked["prompt"] - 1 - (MODE == "short")
surprises = {
    name: [[[number / 100 + draw] * scored for number in range(len(asked["passages"]))] for draw in range(draws)]
    for name, (_, _, draws) in asked["presses"].items()
}
if MODE == "nan":
    surprises["TOVA"][0][0][0] = float("nan")
if MODE == "forgets":
    del surprises["TOVA"]
versions = {"kvpress": "0.5.5", "transformers": "5.3.0" if MODE == "upgraded" else "5.2.0", "torch": "2.13.0"}
print(MARK + json.dumps({"versions": versions, "surprises": surprises}))
