"""Compare a student with its teacher: agreement, calibration, classes, deviations. Conditions make it a gate for CI.

    python recipes/fidelity_report.py STUDENT TEACHER --task movie_sentences --require "agreement>=0.8" "slope<=1.5"
    python recipes/fidelity_report.py STUDENT TEACHER --task mnist_5k --train_rows 0
    python recipes/fidelity_report.py STUDENT TEACHER --train_file train.csv --test_file test.csv

The same as `hfkd report`. STUDENT and TEACHER are folders (`runs/distill_text_demo/runs/distilled/seed-0/model`) or Hub ids;
each reads texts with its own tokenizer and pictures with its own image processor. The conditions stand in quotes, because a
shell takes > for a file. Exit code 1 when a condition is not met, and the last line says which; 2 when it could not be judged,
because of the inputs.
"""

import sys

from hfkd.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
