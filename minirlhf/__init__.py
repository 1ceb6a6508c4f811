import os

# A thread that waits for the others spins, which is quickest while every thread has a core of its
# own. When another program needs a core, most of the time goes into spinning: with 2 threads and 1
# core busy, SFT takes 6 times as long. OpenMP's default is 300,000 turns, and it reads the number
# only when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
