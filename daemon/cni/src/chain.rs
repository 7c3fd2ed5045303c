//! One network's chain of plugins: what each gets on its standard input, and in which order.
//!
//! Spec: CNI 1.1, section 4, "Plugin Delegation" and "Lifecycle & Ordering".

use serde_json::{Map, Value};

use super::conf::{Network, Plugin, Version};
use super::error::{Error, Failure};
use super::exec::{self, Invocation};

impl Network {
    /// `ADD` on every plugin in order, each given the result of the one before. Returns the last.
    /// Every result is handed to `keep` before the next plugin runs: a `DEL` after an `ADD` cut
    /// short needs it, since plugins such as the firewall find their rules by address only.
    pub(super) async fn add<F: Future<Output = Result<(), Error>>>(
        &self,
        call: &Invocation<'_>,
        capabilities: &Map<String, Value>,
        keep: impl Fn(Map<String, Value>) -> F,
    ) -> Result<Map<String, Value>, Error> {
        let mut result: Option<Map<String, Value>> = None;
        for plugin in &self.plugins {
            let stdin = self.stdin(plugin, capabilities, result.as_ref(), &[]);
            let answer = async {
                let output = exec::run(&plugin.kind, &stdin, call).await?;
                self.result_of(&output)
            };
            let answer = answer
                .await
                .map_err(|failure| plugin.failed("add", failure))?;
            keep(answer.clone()).await?;
            result = Some(answer);
        }
        Ok(result.unwrap_or_default())
    }

    /// `DEL` on every plugin in reverse order. Each one is called, even after a failure, so that
    /// one broken plugin does not keep the others' resources; the first failure is returned.
    pub(super) async fn del(
        &self,
        call: &Invocation<'_>,
        capabilities: &Map<String, Value>,
        cached: Option<&Map<String, Value>>,
    ) -> Result<(), Error> {
        let previous = cached.filter(|_| self.version >= Version::CHECK);
        let mut first = Ok(());
        for plugin in self.plugins.iter().rev() {
            let stdin = self.stdin(plugin, capabilities, previous, &[]);
            if let Err(failure) = exec::run(&plugin.kind, &stdin, call).await {
                let error = plugin.failed("delete", failure);
                if first.is_ok() {
                    first = Err(error);
                } else {
                    tracing::warn!(container_id = call.container_id, %error, "network teardown");
                }
            }
        }
        first
    }

    /// A command that answers nothing, on every plugin in order, up to the first failure.
    pub(super) async fn each(
        &self,
        call: &Invocation<'_>,
        verb: &'static str,
        capabilities: &Map<String, Value>,
        cached: Option<&Map<String, Value>>,
        extra: &[(&str, Value)],
    ) -> Result<(), Error> {
        for plugin in &self.plugins {
            let stdin = self.stdin(plugin, capabilities, cached, extra);
            exec::run(&plugin.kind, &stdin, call)
                .await
                .map_err(|failure| plugin.failed(verb, failure))?;
        }
        Ok(())
    }

    /// The plugin's object, completed with what it is to know, keys sorted.
    fn stdin(
        &self,
        plugin: &Plugin,
        capabilities: &Map<String, Value>,
        previous: Option<&Map<String, Value>>,
        extra: &[(&str, Value)],
    ) -> Vec<u8> {
        let mut object = plugin.object.clone();
        object.insert("name".to_owned(), self.name.clone().into());
        object.insert("cniVersion".to_owned(), self.version_text.clone().into());
        let values = capabilities
            .iter()
            .filter(|(key, _)| plugin.capabilities.contains(key))
            .map(|(key, value)| (key.clone(), value.clone()));
        let values: Map<String, Value> = values.collect();
        if !values.is_empty() {
            object.insert("runtimeConfig".to_owned(), values.into());
        }
        if let Some(previous) = previous {
            object.insert("prevResult".to_owned(), previous.clone().into());
        }
        for (key, value) in extra {
            object.insert((*key).to_owned(), value.clone());
        }
        let mut value = Value::Object(object);
        value.sort_all_objects();
        value.to_string().into_bytes()
    }

    /// A plugin's output as a result; one without a version has the configuration's.
    fn result_of(&self, output: &[u8]) -> Result<Map<String, Value>, Failure> {
        let bad = |reason: String| exec::garbage(reason, output, String::new());
        let value = serde_json::from_slice(output).map_err(|e| bad(e.to_string()))?;
        let Value::Object(mut result) = value else {
            return Err(bad("not a JSON object".to_owned()));
        };
        super::result::Answer::parse(&result).map_err(bad)?;
        if result
            .get("cniVersion")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .is_empty()
        {
            result.insert("cniVersion".to_owned(), self.version_text.clone().into());
        }
        Ok(result)
    }
}

impl Plugin {
    pub(super) fn failed(&self, verb: &'static str, failure: Failure) -> Error {
        Error::Plugin {
            kind: self.kind.clone(),
            name: self.name.clone(),
            verb,
            failure: Box::new(failure),
        }
    }
}
