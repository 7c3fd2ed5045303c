//! Marking against naive reachability.

use std::collections::BTreeSet;

use lighter_store::metadata::edges::Kind;
use proptest::prelude::*;

use super::*;

fn node(n: u8) -> Node {
    Node::new(Kind::Content, "n", &n.to_string())
}

fn reach() -> impl Strategy<Value = Reach> {
    prop_oneof![Just(Reach::Flat), Just(Reach::Full)]
}

/// Repeats until nothing changes: slow and plain.
fn naive(roots: &[(u8, Reach)], edges: &[(u8, u8, Reach)]) -> BTreeSet<(u8, Reach)> {
    let mut reached: BTreeSet<(u8, Reach)> = roots.iter().copied().collect();
    loop {
        let mut next = reached.clone();
        for (from, to, by) in edges {
            for have in [Reach::Flat, Reach::Full] {
                if have >= *by && reached.contains(&(*from, have)) {
                    next.insert((*to, have));
                }
            }
        }
        if next == reached {
            return reached;
        }
        reached = next;
    }
}

fn graph(count: u8, roots: &[(u8, Reach)], edges: &[(u8, u8, Reach)]) -> Graph {
    let mut graph = Graph::default();
    for n in 0..count {
        graph.state(Fact::Exists(node(n)));
    }
    for (from, to, by) in edges {
        graph.state(Fact::Edge {
            from: node(*from),
            to: node(*to),
            by: *by,
        });
    }
    for (at, reach) in roots {
        graph.state(Fact::Root(node(*at), *reach));
    }
    graph
}

fn names(nodes: &[Node]) -> BTreeSet<u8> {
    nodes
        .iter()
        .map(|n| n.id.parse().expect("a number"))
        .collect()
}

proptest! {
    #[test]
    fn mark_is_naive_reachability(
        roots in proptest::collection::vec((0..12_u8, reach()), 0..4),
        edges in proptest::collection::vec((0..12_u8, 0..12_u8, reach()), 0..30),
    ) {
        let mut graph = graph(12, &roots, &edges);
        graph.mark();
        let kept: BTreeSet<u8> = naive(&roots, &edges).into_iter().map(|(n, _)| n).collect();
        let garbage: BTreeSet<u8> = (0..12).filter(|n| !kept.contains(n)).collect();
        prop_assert_eq!(names(&graph.garbage()), garbage);
        for n in 0..12 {
            let path = graph.why(&node(n));
            prop_assert_eq!(!path.is_empty(), kept.contains(&n));
            prop_assert!(path.is_empty() || *path.last().unwrap() == node(n));
        }
    }

    /// Edges that come while the mark runs, their targets shaded as the barrier does it: what
    /// is reachable in the end is never garbage.
    #[test]
    fn what_the_barrier_saw_is_kept(
        roots in proptest::collection::vec((0..12_u8, reach()), 0..4),
        before in proptest::collection::vec((0..12_u8, 0..12_u8, reach()), 0..20),
        lost in proptest::collection::vec(0..20_usize, 0..5),
        later in proptest::collection::vec((0..12_u8, 0..12_u8, reach()), 0..8),
        new_roots in proptest::collection::vec((0..12_u8, reach()), 0..3),
    ) {
        // The scan may or may not have seen an edge that was removed meanwhile.
        let seen: Vec<_> = before.iter().enumerate()
            .filter(|(n, _)| !(lost.contains(n) && n % 2 == 0)).map(|(_, e)| *e).collect();
        let mut graph = graph(12, &roots, &seen);
        graph.mark();
        for (_, to, _) in &later {
            graph.shade(&node(*to));
        }
        for (root, _) in &new_roots {
            graph.shade(&node(*root));
        }
        let now: Vec<_> = before.iter().enumerate()
            .filter(|(n, _)| !lost.contains(n)).map(|(_, e)| *e).chain(later.clone()).collect();
        let all: Vec<_> = roots.iter().chain(&new_roots).copied().collect();
        for (kept, _) in naive(&all, &now) {
            prop_assert!(!graph.is_garbage(&node(kept)), "{} was taken", kept);
        }
    }
}

#[test]
fn a_condition_asks_for_the_last_use_of_what_it_keeps() {
    let minute = std::time::Duration::from_secs(60);
    let ago = |minutes: u32| Some(SystemTime::now() - minute * minutes);
    for (used, when, kept) in [
        (ago(1), Condition::Within(minute * 2), true),
        (ago(3), Condition::Within(minute * 2), false),
        (ago(3), Condition::Before(minute * 2), true),
        (None, Condition::Within(minute * 2), false),
    ] {
        let mut graph = graph(2, &[(0, Reach::Full)], &[]);
        graph.state(Fact::Conditional {
            from: node(0),
            to: node(1),
            when,
        });
        if let Some(used) = used {
            graph.state(Fact::UsedAt(node(1), used));
        }
        // What the keeper itself says of its use does not count.
        graph.state(Fact::UsedAt(node(0), SystemTime::now()));
        graph.mark();
        assert_eq!(!graph.is_garbage(&node(1)), kept, "{used:?} {when:?}");
    }
}

#[test]
fn garbage_comes_children_first() {
    let mut graph = graph(
        4,
        &[],
        &[
            (3, 1, Reach::Flat),
            (1, 0, Reach::Flat),
            (2, 0, Reach::Flat),
        ],
    );
    graph.mark();
    let order: Vec<String> = graph.garbage().iter().map(|n| n.id.to_string()).collect();
    let at = |id: &str| order.iter().position(|other| other == id);
    assert!(
        at("3") < at("1") && at("1") < at("0") && at("2") < at("0"),
        "{order:?}"
    );
}
