"""The reward service: the labeler in a process of its own, on its own device, that serves all ranks of a node.

    training -> client.ServiceRewards -> (Unix socket, wire) -> server.Server -> compute.RewardFunction -> labeler
    supervisor.Supervisor starts the server, starts it again when it dies, and writes where it listens

- `interface`: what the trainer sees of any reward service: submit a batch, get a ticket, wait for its rewards.
- `client`: a rank's side; keeps what is not answered, so that a server that dies costs time and nothing else.
- `wire`: what the two sides say to each other.
- `server`: the process; batches the texts of all ranks for the labeler.
- `supervisor`: the first rank of a node has one; it alone starts and ends the process.
"""
