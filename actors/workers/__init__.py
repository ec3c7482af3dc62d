"""Where workers come from, how work reaches them, and what happens when they die.

faults.py       FaultsConfig: deadlines, how often dead workers are replaced, how much may fail
placement.py    placement groups
ray_data.py     a job over shards
ray_train.py    a training function on data-parallel workers
ray_task.py     one function call in a process of its own
standing.py     workers that are asked again and again
leases.py       workers granted to concurrent runs: the actor and its client
lease_queue.py  the priority queue that decides who is next
shared.py       workers that several runs ask
"""
