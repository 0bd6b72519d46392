"""A round: export, dataset, train, evaluate, infer, candidates, query, publish; resumable after each step."""
