"""Measuring: every figure with its interval, its unit, and the machine that it was taken on.

statistics  intervals of scores, paired between two models        latency  distributions, two artifacts in turns
verdict     PASS, FAIL, UNDECIDED: how many more samples          memory   what is resident in a process
quality     scores of two models; outputs beside a reference      size     bytes that a user must ship
types       Interval, Measurement, MemoryUse                      machine  the stamp, and what this machine can do
"""
