"""Names of the leaves of a pytree, such as 'blocks/5/moe/experts/w_in'."""

import jax


def path_name(path: tuple) -> str:
    """Joins the keys of one path by '/'; the '.value' under which an `nnx.Variable` holds its array is left out."""
    keys = [_key(entry) for entry in path]
    if len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and keys[-1] == "value":
        keys.pop()
    return "/".join(keys)


def path_names(tree) -> list[str]:
    """Names of all leaves, in the order of `jax.tree.leaves`."""
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _key(entry) -> str:
    match entry:
        case jax.tree_util.GetAttrKey():
            return entry.name
        case jax.tree_util.SequenceKey():
            return str(entry.idx)
        case _:  # DictKey and FlattenedIndexKey
            return str(entry.key)
