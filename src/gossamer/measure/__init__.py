"""Measuring: every figure with its interval, its unit, and the machine that it was taken on.

statistics  intervals of scores, paired between two models        latency  distributions, two artifacts in turns
types       Interval, Measurement, MemoryUse                      memory   what is resident in a process
machine     the stamp, and what this machine can do               size     bytes that a user must ship
"""
