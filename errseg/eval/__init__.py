"""Evaluation on labelled sets: the published protocol, both mIoU rules, on one process or under torchrun."""
