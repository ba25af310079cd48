"""Engines whose ranks are on several nodes: a node's servers end what is on that node, and agents tell each other that it has come to that.

Each node's part of an engine has an agent, a small process that is of the part's cohort. The agents of the other nodes are connected with that of the
first one. A process that dies takes the cohort of its node with it, the agent too, and the kernel cuts the agent's connections: whoever was connected
ends, and takes the cohort of its own node with it. No process has to be told that it is to end, or could fail to hear it. What says nothing at all, a
node that is lost or a network that is cut, is missed within some seconds.
"""
