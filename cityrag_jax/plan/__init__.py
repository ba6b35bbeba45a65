"""A training planned on a CPU: does it fit, how long is a step, what would be better.

For TPUs the real update is compiled, ahead of time, for chips that are not there. For
GPUs, whose compiler wants one, memory and traffic come by formula.
"""
