//! Which objects are kept: a tri-colour mark over facts. Pure.
//!
//! An object is reached *full* (all its references are followed) or *flat* (only those it cannot be
//! without). Reached flat first and full later, it is followed again. References may name objects
//! that do not exist; they are remembered, because one of that name may come while a collection
//! runs.

use std::collections::HashMap;
use std::time::SystemTime;

use lighter_store::metadata::collect::Judge;
use lighter_store::metadata::edges::{Condition, Fact, Node, Reach};

/// Objects, what keeps what, and how far each was reached.
#[derive(Debug, Default)]
pub struct Graph {
    index: HashMap<Node, usize>,
    objects: Vec<Object>,
    roots: Vec<(usize, Reach)>,
    /// References whose targets say whether they hold: from, to, for which use.
    conditional: Vec<(usize, usize, Condition)>,
    /// Last uses, as labels have them.
    used: HashMap<usize, SystemTime>,
}

#[derive(Debug, Default)]
struct Object {
    exists: bool,
    reached: Option<Reach>,
    edges: Vec<(usize, Reach)>,
}

impl Graph {
    fn at(&mut self, node: Node) -> usize {
        let next = self.objects.len();
        let at = *self.index.entry(node).or_insert(next);
        if at == next {
            self.objects.push(Object::default());
        }
        at
    }

    /// Takes a fact in. Facts of all records come before [`Graph::mark`].
    pub fn state(&mut self, fact: Fact) {
        match fact {
            Fact::Exists(node) => {
                let at = self.at(node);
                self.objects[at].exists = true;
            }
            Fact::Root(node, reach) => {
                let at = self.at(node);
                self.roots.push((at, reach));
            }
            Fact::Edge { from, to, by } => {
                let (from, to) = (self.at(from), self.at(to));
                self.objects[from].edges.push((to, by));
            }
            Fact::Conditional { from, to, when } => {
                let (from, to) = (self.at(from), self.at(to));
                self.conditional.push((from, to, when));
            }
            Fact::UsedAt(node, at) => {
                let node = self.at(node);
                self.used.insert(node, at);
            }
        }
    }

    /// Reaches everything that the roots keep.
    pub fn mark(&mut self) {
        let now = SystemTime::now();
        for (from, to, when) in std::mem::take(&mut self.conditional) {
            if self
                .used
                .get(&to)
                .is_some_and(|used| when.holds(*used, now))
            {
                self.objects[from].edges.push((to, Reach::Full));
            }
        }
        for (at, reach) in self.roots.clone() {
            self.reach(at, reach);
        }
    }

    fn reach(&mut self, at: usize, reach: Reach) {
        let mut grey = vec![(at, reach)];
        while let Some((at, reach)) = grey.pop() {
            let object = &mut self.objects[at];
            if object.reached >= Some(reach) {
                continue;
            }
            object.reached = Some(reach);
            grey.extend(
                object
                    .edges
                    .iter()
                    .filter(|(_, by)| *by <= reach)
                    .map(|(to, _)| (*to, reach)),
            );
        }
    }

    /// Objects that exist and were not reached, children before their parents.
    #[must_use]
    pub fn garbage(&self) -> Vec<Node> {
        let mut found: Vec<(usize, &Node)> = self
            .index
            .iter()
            .map(|(node, at)| (*at, node))
            .filter(|(at, _)| self.objects[*at].exists && self.objects[*at].reached.is_none())
            .collect();
        // Kinds in the order of their declaration, then what keeps before what it keeps.
        let depth = self.depths();
        found.sort_by_key(|(at, node)| (node.kind, depth[*at], *node));
        found.into_iter().map(|(_, node)| node.clone()).collect()
    }

    /// For each object a number greater than that of everything that keeps it flat.
    fn depths(&self) -> Vec<usize> {
        let mut keepers = vec![0_usize; self.objects.len()];
        let flat = |object: &Object| {
            let edges = object.edges.clone();
            edges.into_iter().filter(|(_, by)| *by == Reach::Flat)
        };
        for object in &self.objects {
            for (to, _) in flat(object) {
                keepers[to] += 1;
            }
        }
        let mut depth = vec![0; self.objects.len()];
        let mut ready: Vec<usize> = (0..keepers.len()).filter(|at| keepers[*at] == 0).collect();
        while let Some(at) = ready.pop() {
            for (to, _) in flat(&self.objects[at]) {
                depth[to] = depth[to].max(depth[at] + 1);
                keepers[to] -= 1;
                if keepers[to] == 0 {
                    ready.push(to);
                }
            }
        }
        depth
    }

    /// The shortest path from a root to `wanted`, both included; empty when nothing keeps it.
    #[must_use]
    pub fn why(&self, wanted: &Node) -> Vec<Node> {
        let Some(&wanted) = self.index.get(wanted) else {
            return Vec::new();
        };
        let mut from: HashMap<(usize, Reach), Option<(usize, Reach)>> = HashMap::new();
        let mut queue = std::collections::VecDeque::new();
        for &(at, reach) in &self.roots {
            if self.objects[at].exists && from.insert((at, reach), None).is_none() {
                queue.push_back((at, reach));
            }
        }
        while let Some((at, reach)) = queue.pop_front() {
            if at == wanted {
                return self.path((at, reach), &from);
            }
            for &(to, by) in &self.objects[at].edges {
                if by <= reach && !from.contains_key(&(to, reach)) {
                    from.insert((to, reach), Some((at, reach)));
                    queue.push_back((to, reach));
                }
            }
        }
        Vec::new()
    }

    /// Whether the object has a record.
    #[must_use]
    pub fn exists(&self, node: &Node) -> bool {
        self.index
            .get(node)
            .is_some_and(|at| self.objects[*at].exists)
    }

    /// Everything that exists and is kept, itself included, by each of `roots`; flat and by labels.
    #[must_use]
    pub fn kept_by<'a>(&'a self, roots: &[Node]) -> Vec<Vec<&'a Node>> {
        let mut names: Vec<Option<&Node>> = vec![None; self.objects.len()];
        for (node, at) in &self.index {
            names[*at] = Some(node);
        }
        let mut seen = vec![usize::MAX; self.objects.len()];
        let mut all = Vec::with_capacity(roots.len());
        for (turn, root) in roots.iter().enumerate() {
            let mut found = Vec::new();
            let mut grey: Vec<usize> = self.index.get(root).copied().into_iter().collect();
            while let Some(at) = grey.pop() {
                if std::mem::replace(&mut seen[at], turn) == turn {
                    continue;
                }
                let object = &self.objects[at];
                if object.exists {
                    found.extend(names[at]);
                }
                grey.extend(object.edges.iter().map(|(to, _)| *to));
            }
            all.push(found);
        }
        all
    }

    fn path(
        &self,
        end: (usize, Reach),
        from: &HashMap<(usize, Reach), Option<(usize, Reach)>>,
    ) -> Vec<Node> {
        let mut steps = vec![end.0];
        let mut at = end;
        while let Some(Some(before)) = from.get(&at) {
            steps.push(before.0);
            at = *before;
        }
        steps.reverse();
        let names: HashMap<usize, &Node> = self.index.iter().map(|(n, at)| (*at, n)).collect();
        steps.iter().map(|at| names[at].clone()).collect()
    }
}

impl Judge for Graph {
    fn shade(&mut self, node: &Node) {
        // What the scan knows nothing of is no candidate, and what it refers to is shaded as well.
        if let Some(&at) = self.index.get(node) {
            self.reach(at, Reach::Full);
        }
    }

    fn is_garbage(&self, node: &Node) -> bool {
        self.index
            .get(node)
            .is_some_and(|at| self.objects[*at].reached.is_none())
    }
}

#[cfg(test)]
mod tests;
